#!lua flags=allow-oom
-- Outcome, reply and acknowledgement as one step; a frame acknowledged before emits nothing.
-- KEYS: frames, verdicts, unstored, dead, shadow-verdicts, shadow-sequence; the route is only read: a worker may not more.
-- ARGV: prefix, window_s, most shadow verdicts, most bytes of replies and their life, then per frame: entry, frame_id,
-- outcome, reply ('' where it is the outcome), dead_reason, compared ('' where it is the outcome).
-- While a candidate is compared, a copy goes to shadow, of sampled frames admitted since then: what is compared is
-- decided here, in the same step, so that both sides agree on it. It is numbered, so that what falls off shows as a gap.
local first, expiring, large = {}, {}, {}
local compared = redis.call('HMGET', ARGV[1] .. 'routing', 'comparison', 'compared_from', 'sample_fraction')
local from_ms, from_seq
if compared[1] then from_ms, from_seq = string.match(compared[2], '^(%d+)-(%d+)$') end
local function shown(entry, frame_id)
  if not compared[1] then return false end
  local ms, seq = string.match(entry, '^(%d+)-(%d+)$')
  ms, seq = tonumber(ms), tonumber(seq)
  if ms < tonumber(from_ms) or (ms == tonumber(from_ms) and seq <= tonumber(from_seq)) then return false end
  return tonumber(string.sub(redis.sha1hex(frame_id), 1, 8), 16) / 4294967296 < tonumber(compared[3])
end
for i = 6, #ARGV, 6 do
  local entry, frame_id, outcome, reply, dead, copy = unpack(ARGV, i, i + 5)
  local won = redis.call('XACK', KEYS[1], 'live', entry)
  first[#first + 1] = won
  if won == 1 then
    redis.call('XADD', KEYS[2], '*', 'e', entry, 'v', outcome)
    redis.call('ZADD', KEYS[3], string.match(entry, '^%d+'), entry)
    if dead ~= '' then redis.call('XADD', KEYS[4], 'MAXLEN', '~', 10000, '*', 'f', frame_id, 'e', entry, 'r', dead) end
    local frame = ARGV[1] .. 'frame:' .. frame_id
    local known = redis.call('HMGET', frame, 'd', 'r')
    if known[1] then
      if reply == '' then redis.call('HSET', frame, 'v', outcome) else redis.call('HDEL', frame, 's') end
      redis.call('EXPIRE', frame, ARGV[2])
      if known[2] and known[2] ~= '' then
        local replies = ARGV[1] .. 'replies:' .. known[2]
        redis.call('XADD', replies, 'MAXLEN', '~', 1000, '*', 'o', reply == '' and outcome or reply)
        expiring[replies] = true
        if reply ~= '' then large[replies] = true end
      end
    end
    if shown(entry, frame_id) then
      local number = redis.call('INCR', KEYS[6])
      redis.call('XADD', KEYS[5], 'MAXLEN', ARGV[3], '*', 'n', number, 's', 'live', 'c', compared[1],
        'f', frame_id, 'o', copy == '' and outcome or copy, 'h', '')
    end
  end
end
for replies in pairs(expiring) do redis.call('EXPIRE', replies, ARGV[5]) end
-- Its reader takes them at once; one that is gone or slow must not let pictures fill the server past its memory.
for replies in pairs(large) do
  local left, held = redis.call('XLEN', replies), redis.call('MEMORY', 'USAGE', replies, 'SAMPLES', 0)
  while left > 1 and held > tonumber(ARGV[4]) do
    left = math.max(1, math.floor(left * ARGV[4] / held))
    redis.call('XTRIM', replies, 'MAXLEN', left)
    held = redis.call('MEMORY', 'USAGE', replies, 'SAMPLES', 0)
  end
end
return first
