#!lua flags=allow-oom
-- A candidate's outcomes and their acknowledgement as one step; touches nothing of live's.
-- KEYS: frames, routing, shadow-verdicts, shadow-sequence.  ARGV: digest, most shadow verdicts, then per frame: entry,
-- frame_id, outcome ('' for a frame outside the sample), header.
local first = {}
local compared = redis.call('HMGET', KEYS[2], 'comparison', 'candidate_digest')
for i = 3, #ARGV, 4 do
  local won = redis.call('XACK', KEYS[1], 'shadow', ARGV[i])
  first[#first + 1] = won
  if won == 1 and ARGV[i + 2] ~= '' and compared[2] == ARGV[1] then
    local number = redis.call('INCR', KEYS[4])
    redis.call('XADD', KEYS[3], 'MAXLEN', ARGV[2], '*', 'n', number, 's', 'candidate', 'c', compared[1],
      'f', ARGV[i + 1], 'o', ARGV[i + 2], 'h', ARGV[i + 3])
  end
end
return first
