#!lua flags=allow-oom
-- One step of a report: what was counted, what waits for its pair, and how far it read, all or nothing.
-- KEYS: cursor, report, joint, open, worst, details, comparisons, verdicts.
-- ARGV: expected place, new place, new number, seconds to keep, most disagreements kept, most comparisons kept, trim
-- ('1': the verdicts up to the new place go); then as text, for thousands of arguments would cost more than the work:
-- "field count" to add, "field value" to keep the greatest, "cell count" of the joint histogram, "frame state" of open
-- frames, "frame" of those to forget, and comparisons as one string with their lengths; then three lists, each its
-- length before its items: fact field value; open frame_id state; disagreement frame_id severity detail.
-- A step computed from another place than the cursor's was counted before, or belongs to an owner that lost its lease:
-- it changes nothing and 0 comes back. So no verdict is counted twice, whoever dies when.
local place = redis.call('HGET', KEYS[1], 'place') or '0-0'
if place ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'place', ARGV[2], 'number', ARGV[3])
for field, count in string.gmatch(ARGV[8], '(%S+) (%S+)') do redis.call('HINCRBY', KEYS[2], field, count) end
for field, value in string.gmatch(ARGV[9], '(%S+) (%S+)') do
  if tonumber(value) > tonumber(redis.call('HGET', KEYS[2], field) or '-1') then
    redis.call('HSET', KEYS[2], field, value)
  end
end
for cell, count in string.gmatch(ARGV[10], '(%S+) (%S+)') do redis.call('HINCRBY', KEYS[3], cell, count) end
for frame, state in string.gmatch(ARGV[11], '(%S+) (%S+)') do redis.call('HSET', KEYS[4], frame, state) end
for frame in string.gmatch(ARGV[12], '%S+') do redis.call('HDEL', KEYS[4], frame) end
local from = 1
for length in string.gmatch(ARGV[14], '%S+') do
  local to = from + tonumber(length) - 1
  redis.call('XADD', KEYS[7], 'MAXLEN', '~', ARGV[6], '*', 'c', string.sub(ARGV[13], from, to))
  from = to + 1
end
local at = 15
local function each(width, act)
  local count = tonumber(ARGV[at])
  at = at + 1
  for _ = 1, count do
    act(unpack(ARGV, at, at + width - 1))
    at = at + width
  end
  return count
end
each(2, function(field, value) redis.call('HSET', KEYS[2], field, value) end)
each(2, function(frame, state)
  if state == '' then redis.call('HDEL', KEYS[4], frame) else redis.call('HSET', KEYS[4], frame, state) end
end)
local disagreed = each(3, function(frame, severity, detail)
  redis.call('ZADD', KEYS[5], severity, frame)
  redis.call('HSET', KEYS[6], frame, detail)
end)
if disagreed > 0 then
  local over = redis.call('ZCARD', KEYS[5]) - tonumber(ARGV[5])
  if over > 0 then
    for _, frame in ipairs(redis.call('ZRANGE', KEYS[5], 0, over - 1)) do redis.call('HDEL', KEYS[6], frame) end
    redis.call('ZREMRANGEBYRANK', KEYS[5], 0, over - 1)
  end
end
for i = 2, 6 do redis.call('EXPIRE', KEYS[i], ARGV[4]) end
if ARGV[7] == '1' then
  local ms, seq = string.match(ARGV[2], '^(%d+)-(%d+)$')
  redis.call('XTRIM', KEYS[8], 'MINID', ms .. '-' .. string.format('%.0f', tonumber(seq) + 1))
end
return 1
