#!lua flags=allow-oom
-- Makes a version live in one step; the change's stream id is its generation.
-- KEYS: routing, changes.  ARGV: version, digest, threshold ('' for the bundle's own).
local generation = redis.call('HINCRBY', KEYS[1], 'generation', 1)
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'digest', ARGV[2], 'threshold', ARGV[3])
redis.call('XADD', KEYS[2], 'MAXLEN', 16, generation .. '-0', 'generation', generation)
return generation
