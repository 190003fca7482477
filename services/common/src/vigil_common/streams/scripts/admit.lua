-- Puts a frame into the queue once, within the byte budget.
-- KEYS: frames, budget, frame.  ARGV: sha256, header, image, reply_to, size, limit, ttl_s.
-- Without allow-oom: over maxmemory the XADD is refused before anything has been written.
local known = redis.call('HMGET', KEYS[3], 'd', 'v', 's')
if known[1] then
  if known[1] ~= ARGV[1] then return {'reused'} end
  if known[2] then return {'judged', known[2]} end
  if known[3] then
    if ARGV[4] ~= '' then redis.call('HSET', KEYS[3], 'r', ARGV[4]) end
    return {'pending'}
  end
end
local budget = redis.call('HMGET', KEYS[2], 'total', 'head')
local total = tonumber(budget[1] or '0')
local size = tonumber(ARGV[5])
if total - tonumber(budget[2] or '0') + size > tonumber(ARGV[6]) then return {'full'} end
local id = redis.call('XADD', KEYS[1], '*', 'h', ARGV[2], 'i', ARGV[3], 'o', total)
redis.call('HSET', KEYS[2], 'total', total + size, 'limit', ARGV[6])
redis.call('HSET', KEYS[3], 'd', ARGV[1], 's', id, 'r', ARGV[4])
redis.call('EXPIRE', KEYS[3], ARGV[7])
return {'admitted'}
