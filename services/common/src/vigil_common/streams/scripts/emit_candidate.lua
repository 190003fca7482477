#!lua flags=allow-oom
-- A candidate's outcomes and their acknowledgement as one step; touches nothing of live's.
-- KEYS: frames, shadow-verdicts, shadow-sequence; the route is only read.  ARGV: prefix, digest, most shadow verdicts,
-- then per frame: entry, frame_id, outcome ('' for a frame outside the sample), header.
local first = {}
local compared = redis.call('HMGET', ARGV[1] .. 'routing', 'comparison', 'candidate_digest')
for i = 4, #ARGV, 4 do
  local won = redis.call('XACK', KEYS[1], 'shadow', ARGV[i])
  first[#first + 1] = won
  if won == 1 and ARGV[i + 2] ~= '' and compared[2] == ARGV[2] then
    local number = redis.call('INCR', KEYS[3])
    redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[3], '*', 'n', number, 's', 'candidate', 'c', compared[1],
      'f', ARGV[i + 1], 'o', ARGV[i + 2], 'h', ARGV[i + 3])
  end
end
return first
