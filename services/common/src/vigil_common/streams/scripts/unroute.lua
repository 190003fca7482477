#!lua flags=allow-oom
-- Removes a model's route; its generation goes on counting, for a route that may come again.
-- KEYS: routing, changes, frames; the log of what people say is only read.  ARGV: prefix.
-- Returns how many frames are still in the queue, with what people said that waits to be stored.
-- The changes go too: whoever waits for the next one looks at the route after the wait, and nobody is woken for naught.
local left = redis.call('HMGET', KEYS[1], 'generation', 'last_comparison')
if left[1] then
  redis.call('DEL', KEYS[1], KEYS[2])
  redis.call('HSET', KEYS[1], 'generation', left[1])
  if left[2] then redis.call('HSET', KEYS[1], 'last_comparison', left[2]) end
  if redis.call('EXISTS', KEYS[3]) == 1 then redis.call('XGROUP', 'DESTROY', KEYS[3], 'shadow') end
end
-- Users of Redis made before may not ask.
local said = redis.pcall('XLEN', ARGV[1] .. 'annotations')
return redis.call('XLEN', KEYS[3]) + (type(said) == 'number' and said or 0)
