-- Puts what a person said into the log once, within the bound; answers with the place and body that wait under its id.
-- KEYS: annotations, ids.  ARGV: id, body, mask, limit.  The id's field holds its place while it waits.
local function before(place)
  local ms, number = string.match(place, '^(%d+)-(%d+)$')
  if number == '0' then return string.format('%.0f-18446744073709551615', ms - 1) end
  return string.format('%s-%.0f', ms, number - 1)
end

local known = redis.call('HGET', KEYS[2], ARGV[1])
if known then
  -- What storage may do to this stream is XREAD, which gives what comes after a place.
  local found = redis.call('XREAD', 'COUNT', 1, 'STREAMS', KEYS[1], before(known))
  local entry = found and found[1][2][1]
  if entry and entry[1] == known then return {known, entry[2][4]} end
end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[4]) then return false end
local place = redis.call('XADD', KEYS[1], '*', 'i', ARGV[1], 'b', ARGV[2], 'm', ARGV[3])
redis.call('HSET', KEYS[2], ARGV[1], place)
return {place, ARGV[2]}
