#!lua flags=allow-oom
-- Outcome, reply and acknowledgement as one step; a frame acknowledged before emits nothing.
-- KEYS: frames, verdicts, unstored, dead.  ARGV: prefix, window_s, then per frame: entry, frame_id, outcome,
-- reply ('' where it is the outcome), dead_reason.
local first = {}
for i = 3, #ARGV, 5 do
  local entry, frame_id, outcome, reply, dead = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local won = redis.call('XACK', KEYS[1], 'live', entry)
  first[#first + 1] = won
  if won == 1 then
    redis.call('XADD', KEYS[2], '*', 'e', entry, 'v', outcome)
    redis.call('ZADD', KEYS[3], string.match(entry, '^%d+'), entry)
    if dead ~= '' then redis.call('XADD', KEYS[4], 'MAXLEN', '~', 10000, '*', 'f', frame_id, 'e', entry, 'r', dead) end
    local frame = ARGV[1] .. 'frame:' .. frame_id
    local known = redis.call('HMGET', frame, 'd', 'r')
    if known[1] then
      redis.call('HDEL', frame, 's')
      if reply == '' then redis.call('HSET', frame, 'v', outcome) end
      redis.call('EXPIRE', frame, ARGV[2])
      if known[2] and known[2] ~= '' then
        local replies = ARGV[1] .. 'replies:' .. known[2]
        redis.call('XADD', replies, 'MAXLEN', '~', 1000, '*', 'o', reply == '' and outcome or reply)
        redis.call('EXPIRE', replies, 3600)
      end
    end
  end
end
return first
