-- Takes readers out of a group that hold nothing and have long not been seen: each start of a worker brings a name.
-- KEYS: frames.  ARGV: group, ms.
-- What a reader still holds would go with its name, and no claim would find it: so both in one step.
for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local fields = {}
  for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
  if fields['pending'] == 0 and fields['idle'] > tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], fields['name'])
  end
end
