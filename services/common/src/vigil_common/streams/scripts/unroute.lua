#!lua flags=allow-oom
-- Removes a model's route; its generation goes on counting, for a route that may come again.
-- KEYS: routing, changes, frames.  Returns how many frames are still in the queue.
-- The changes go too: whoever waits for the next one looks at the route after the wait, and nobody is woken for naught.
local left = redis.call('HMGET', KEYS[1], 'generation', 'last_comparison')
if left[1] then
  redis.call('DEL', KEYS[1], KEYS[2])
  redis.call('HSET', KEYS[1], 'generation', left[1])
  if left[2] then redis.call('HSET', KEYS[1], 'last_comparison', left[2]) end
  if redis.call('EXISTS', KEYS[3]) == 1 then redis.call('XGROUP', 'DESTROY', KEYS[3], 'shadow') end
end
return redis.call('XLEN', KEYS[3])
