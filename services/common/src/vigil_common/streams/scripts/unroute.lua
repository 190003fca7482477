#!lua flags=allow-oom
-- Removes a model's route; its generation goes on counting, for a route that may come again.
-- KEYS: routing, changes, frames.  Returns how many frames are still in the queue.
-- The changes go too: whoever waits for the next one looks at the route after the wait, and nobody is woken for naught.
local generation = redis.call('HGET', KEYS[1], 'generation')
if generation then
  redis.call('DEL', KEYS[1], KEYS[2])
  redis.call('HSET', KEYS[1], 'generation', generation)
  if redis.call('EXISTS', KEYS[3]) == 1 then redis.call('XGROUP', 'DESTROY', KEYS[3], 'shadow') end
end
return redis.call('XLEN', KEYS[3])
