#!lua flags=allow-oom
-- Says which part of a model's normal frames is stored.
-- KEYS: routing, for the right to run this; the fraction's key is named here, for users of Redis made before have none
-- to run scripts on it.  ARGV: prefix, fraction.
redis.call('SET', ARGV[1] .. 'keep-fraction', ARGV[2])
