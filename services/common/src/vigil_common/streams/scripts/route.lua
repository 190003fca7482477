#!lua flags=allow-oom
-- Writes a model's whole route in one step; the change's stream id is its generation.
-- KEYS: routing, changes, frames.  ARGV: version, digest, threshold ('' for the bundle's own), then the candidate's
-- version, digest, threshold, sample fraction (version '' for none).
-- What is compared (both digests and thresholds) has a number of its own, the generation in which it began: another
-- pair begins another comparison, with the frames that come after.
local generation = redis.call('HINCRBY', KEYS[1], 'generation', 1)
local old = redis.call('HMGET', KEYS[1], 'digest', 'threshold', 'candidate_digest', 'candidate_threshold', 'comparison')
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'digest', ARGV[2], 'threshold', ARGV[3])
local comparison = 0
if ARGV[4] == '' then
  redis.call('HDEL', KEYS[1], 'candidate_version', 'candidate_digest', 'candidate_threshold', 'sample_fraction',
    'comparison', 'compared_from')
  redis.call('XGROUP', 'DESTROY', KEYS[3], 'shadow')
else
  local same = old[5] and old[1] == ARGV[2] and old[2] == ARGV[3] and old[3] == ARGV[5] and old[4] == ARGV[6]
  if same then
    comparison = tonumber(old[5])
  else
    comparison = generation
    local last = '0-0'
    local info = redis.call('XINFO', 'STREAM', KEYS[3])
    for i = 1, #info, 2 do if info[i] == 'last-generated-id' then last = info[i + 1] end end
    redis.call('XGROUP', 'DESTROY', KEYS[3], 'shadow')
    redis.call('XGROUP', 'CREATE', KEYS[3], 'shadow', last)
    redis.call('HSET', KEYS[1], 'comparison', comparison, 'compared_from', last)
  end
  redis.call('HSET', KEYS[1], 'candidate_version', ARGV[4], 'candidate_digest', ARGV[5],
    'candidate_threshold', ARGV[6], 'sample_fraction', ARGV[7])
end
redis.call('XADD', KEYS[2], 'MAXLEN', 16, generation .. '-0', 'generation', generation)
return {generation, comparison}
