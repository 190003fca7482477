#!lua flags=allow-oom
-- Drops what nobody needs any more, from the heads only.
-- KEYS: frames, verdicts, unstored, budget, routing.  ARGV: prefix, frames that the queue may hold for shadow's sake.
-- Returns how many frames went, -1 where a group is missing.
local LAST = '18446744073709551615'
local function following(ms, seq)
  -- Where shadow was moved to just before a millisecond's first entry, there is no next one within its own.
  if seq == LAST then return string.format('%.0f', tonumber(ms) + 1), '0' end
  return ms, string.format('%.0f', tonumber(seq) + 1)
end
local function low_water(key, group)
  local found
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local fields = {}
    for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
    if fields['name'] == group then found = fields end
  end
  if not found then return nil end
  local next_ms, next_seq = following(string.match(found['last-delivered-id'], '^(%d+)-(%d+)$'))
  local unread = next_ms .. '-' .. next_seq
  local backlog = found['pending'] + (tonumber(found['lag']) or 0)
  local pending = redis.call('XPENDING', key, group, '-', '+', 1)
  if pending[1] then
    local ms, seq = string.match(pending[1][1], '^(%d+)-(%d+)$')
    return ms, seq, unread, backlog
  end
  return next_ms, next_seq, unread, backlog
end
local function earlier(ms, seq, than_ms, than_seq)
  return tonumber(ms) < tonumber(than_ms) or (ms == than_ms and tonumber(seq) < tonumber(than_seq))
end
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('EXISTS', KEYS[2]) == 0 then return -1 end
local ms, seq, _, unjudged = low_water(KEYS[1], 'live')
local outcome_ms, outcome_seq = low_water(KEYS[2], 'storage')
if not ms or not outcome_ms then return -1 end
local unstored = redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
if unstored[1] then
  -- Within one millisecond the set is in text order, so -10 stands before -2.
  for _, entry in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], unstored[2], unstored[2])) do
    local store_ms, store_seq = string.match(entry, '^(%d+)-(%d+)$')
    if earlier(store_ms, store_seq, ms, seq) then ms, seq = store_ms, store_seq end
  end
end
local trimmed = 0
local function trim(id)
  local count = redis.call('XTRIM', KEYS[1], 'MINID', id)
  trimmed = trimmed + count
  return count
end
local function held_bytes()
  local head = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)
  local total = redis.call('HGET', KEYS[4], 'total') or '0'
  local offset = total
  if head[1] then
    local fields = head[1][2]
    for i = 1, #fields, 2 do if fields[i] == 'o' then offset = fields[i + 1] end end
  end
  redis.call('HSET', KEYS[4], 'head', offset)
  return tonumber(total) - tonumber(offset)
end
local comparison = redis.call('HGET', KEYS[5], 'comparison')
local shadow_ms, shadow_seq, unread
if comparison then shadow_ms, shadow_seq, unread = low_water(KEYS[1], 'shadow') end
if shadow_ms and earlier(shadow_ms, shadow_seq, ms, seq) then
  -- Shadow is behind. What it alone has yet to judge stays while it is not much and the queue is less than half full;
  -- then shadow goes on where live is. So it never costs live a frame, and what it skips is counted.
  trim(shadow_ms .. '-' .. shadow_seq)
  local limit = tonumber(redis.call('HGET', KEYS[4], 'limit') or 'inf')
  local held = redis.call('XLEN', KEYS[1]) - unjudged - redis.call('ZCARD', KEYS[3])
  if held > tonumber(ARGV[2]) or held_bytes() > limit / 2 then
    local target = ms .. '-' .. seq
    local skipped = 0
    local pending = redis.call('XPENDING', KEYS[1], 'shadow', '-', '(' .. target, 10000)
    for _, entry in ipairs(pending) do skipped = skipped + redis.call('XACK', KEYS[1], 'shadow', entry[1]) end
    -- What it has read is counted above; what it never saw is what goes between there and the target, if that is later.
    local unread_ms, unread_seq = string.match(unread, '^(%d+)-(%d+)$')
    local unseen = 0
    if earlier(unread_ms, unread_seq, ms, seq) then
      trim(unread)
      unseen = trim(target)
    else
      trim(target)
    end
    if unseen > 0 then
      skipped = skipped + unseen
      local before = seq == '0' and string.format('%.0f-%s', tonumber(ms) - 1, LAST)
        or string.format('%s-%.0f', ms, tonumber(seq) - 1)
      redis.call('XGROUP', 'SETID', KEYS[1], 'shadow', before)
    end
    redis.call('HINCRBY', ARGV[1] .. 'shadow-report:' .. comparison, 'skipped', skipped)
  end
else
  trim(ms .. '-' .. seq)
end
redis.call('XTRIM', KEYS[2], 'MINID', outcome_ms .. '-' .. outcome_seq)
if trimmed > 0 then held_bytes() end
return trimmed
