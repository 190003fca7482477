-- Puts frames into the queue, each once, within the byte budget.
-- KEYS: frames, budget, then a key of each frame.
-- ARGV: limit, ttl_s, then per frame: sha256, header, image, reply_to, size.
-- Without allow-oom: over maxmemory the first write is refused, and all others with it.
local limit, ttl_s = tonumber(ARGV[1]), ARGV[2]
local budget = redis.call('HMGET', KEYS[2], 'total', 'head')
local total, head = tonumber(budget[1] or '0'), tonumber(budget[2] or '0')
local written, replies = 0, {}

local function write(...)
  local done = redis.pcall(...)
  if type(done) ~= 'table' or not done.err then return done end
  if string.find(done.err, 'used memory', 1, true) then return nil end
  error(done)
end

local function admit(key, sha256, header, image, reply_to, size)
  local known = redis.call('HMGET', key, 'd', 'v', 's')
  if known[1] then
    if known[1] ~= sha256 then return {'reused'} end
    if known[2] then return {'judged', known[2]} end
    if known[3] then
      if reply_to ~= '' and not write('HSET', key, 'r', reply_to) then return {'full'} end
      return {'pending'}
    end
  end
  if total - head + size > limit then return {'full'} end
  local id = write('XADD', KEYS[1], '*', 'h', header, 'i', image, 'o', total)
  if not id then return {'full'} end
  redis.call('HSET', key, 'd', sha256, 's', id, 'r', reply_to)
  redis.call('EXPIRE', key, ttl_s)
  total, written = total + size, written + 1
  return {'admitted'}
end

for i = 3, #KEYS do
  local at = 3 + 5 * (i - 3)
  local sha256, header, image, reply_to, size = unpack(ARGV, at, at + 4)
  replies[i - 2] = admit(KEYS[i], sha256, header, image, reply_to, tonumber(size))
end
if written > 0 then redis.call('HSET', KEYS[2], 'total', total, 'limit', ARGV[1]) end
return replies
