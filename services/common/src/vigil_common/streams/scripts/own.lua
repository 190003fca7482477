#!lua flags=allow-oom
-- Takes or renews a lease.  KEYS: lease.  ARGV: owner, ttl_ms (0 gives it back).
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then redis.call('DEL', KEYS[1]) return 1 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
