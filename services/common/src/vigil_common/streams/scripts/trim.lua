#!lua flags=allow-oom
-- Drops what nobody needs any more, from the heads only.
-- KEYS: frames, verdicts, unstored, budget.  Returns how many frames went, -1 where a group is missing.
local function low_water(key, group)
  local found
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local fields = {}
    for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
    if fields['name'] == group then found = fields end
  end
  if not found then return nil end
  local ms, seq = string.match(found['last-delivered-id'], '^(%d+)-(%d+)$')
  local pending = redis.call('XPENDING', key, group, '-', '+', 1)
  if pending[1] then return string.match(pending[1][1], '^(%d+)-(%d+)$') end
  return ms, tostring(tonumber(seq) + 1)
end
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('EXISTS', KEYS[2]) == 0 then return -1 end
local ms, seq = low_water(KEYS[1], 'live')
local outcome_ms, outcome_seq = low_water(KEYS[2], 'storage')
if not ms or not outcome_ms then return -1 end
local unstored = redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
if unstored[1] then
  -- Within one millisecond the set is in text order, so -10 stands before -2.
  for _, entry in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], unstored[2], unstored[2])) do
    local store_ms, store_seq = string.match(entry, '^(%d+)-(%d+)$')
    local earlier = tonumber(store_ms) < tonumber(ms)
    if earlier or (store_ms == ms and tonumber(store_seq) < tonumber(seq)) then ms, seq = store_ms, store_seq end
  end
end
local trimmed = redis.call('XTRIM', KEYS[1], 'MINID', ms .. '-' .. seq)
redis.call('XTRIM', KEYS[2], 'MINID', outcome_ms .. '-' .. outcome_seq)
if trimmed > 0 then
  local head = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)
  local offset = redis.call('HGET', KEYS[4], 'total')
  if head[1] then
    local fields = head[1][2]
    for i = 1, #fields, 2 do if fields[i] == 'o' then offset = fields[i + 1] end end
  end
  redis.call('HSET', KEYS[4], 'head', offset or 0)
end
return trimmed
