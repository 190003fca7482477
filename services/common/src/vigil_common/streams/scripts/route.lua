#!lua flags=allow-oom
-- Writes a model's whole route in one step; the change's stream id is its generation.
-- KEYS: routing, changes, frames.  ARGV: prefix, seconds that a report is kept, version, digest, threshold ('' for the
-- bundle's own), then the candidate's version, digest, threshold, sample fraction (version '' for none), then the
-- generation that must still stand ('0': nothing is live; '' for whatever stands), else nothing changes and 0 comes back,
-- then which AnomalyModel decides ('' where people do).
-- What is compared (both digests and thresholds) has a number of its own, the generation in which it began: another
-- pair begins another comparison, with a report of its own and the frames that come after.
if ARGV[10] ~= '' then
  local stands = redis.call('HMGET', KEYS[1], 'version', 'generation')
  if (stands[1] and stands[2] or '0') ~= ARGV[10] then return {0, 0} end
end
-- The groups that nothing goes on without, from the very beginning of their streams.
for stream, group in pairs({frames = 'live', verdicts = 'storage', comparisons = 'storage'}) do
  local made = redis.pcall('XGROUP', 'CREATE', ARGV[1] .. stream, group, '0', 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP') then return made end
end
local generation = redis.call('HINCRBY', KEYS[1], 'generation', 1)
local old = redis.call('HMGET', KEYS[1], 'digest', 'threshold', 'candidate_digest', 'candidate_threshold', 'comparison')
redis.call('HSET', KEYS[1], 'version', ARGV[3], 'digest', ARGV[4], 'threshold', ARGV[5],
  'managed_by', ARGV[11])
local comparison = 0
if ARGV[6] == '' then
  redis.call('HDEL', KEYS[1], 'candidate_version', 'candidate_digest', 'candidate_threshold', 'sample_fraction',
    'comparison', 'compared_from')
  redis.call('XGROUP', 'DESTROY', KEYS[3], 'shadow')
else
  local same = old[5] and old[1] == ARGV[4] and old[2] == ARGV[5] and old[3] == ARGV[7] and old[4] == ARGV[8]
  if same then
    comparison = tonumber(old[5])
  else
    comparison = generation
    local last = '0-0'
    local info = redis.call('XINFO', 'STREAM', KEYS[3])
    for i = 1, #info, 2 do if info[i] == 'last-generated-id' then last = info[i + 1] end end
    redis.call('XGROUP', 'DESTROY', KEYS[3], 'shadow')
    redis.call('XGROUP', 'CREATE', KEYS[3], 'shadow', last)
    redis.call('HSET', KEYS[1], 'comparison', comparison, 'compared_from', last, 'last_comparison', comparison)
  end
  redis.call('HSET', KEYS[1], 'candidate_version', ARGV[6], 'candidate_digest', ARGV[7],
    'candidate_threshold', ARGV[8], 'sample_fraction', ARGV[9])
  local report = ARGV[1] .. 'shadow-report:' .. comparison
  redis.call('HSET', report, 'live_version', ARGV[3], 'live_digest', ARGV[4], 'live_threshold', ARGV[5],
    'candidate_version', ARGV[6], 'candidate_digest', ARGV[7], 'candidate_threshold', ARGV[8],
    'sample_fraction', ARGV[9])
  redis.call('HSETNX', report, 'started_at_ms', redis.call('TIME')[1] .. '000')
  redis.call('EXPIRE', report, ARGV[2])
end
redis.call('XADD', KEYS[2], 'MAXLEN', 16, generation .. '-0', 'generation', generation)
return {generation, comparison}
