-- Puts what a person said into the log once, within the bound.
-- KEYS: annotations, ids.  ARGV: id, body, mask, limit.  The id's field holds its place while it waits.
local known = redis.call('HGET', KEYS[2], ARGV[1])
if known then return known end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[4]) then return '' end
local place = redis.call('XADD', KEYS[1], '*', 'i', ARGV[1], 'b', ARGV[2], 'm', ARGV[3])
redis.call('HSET', KEYS[2], ARGV[1], place)
return place
