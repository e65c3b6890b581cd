-- What is still known of an app's broadcasts, for the history calls: one portion, from the highest id downwards. Bounded, so that
-- neither Redis nor who asks ever holds a whole log.
--
-- KEYS log, retained
-- ARGV lowest id, highest id, kind (all, retained, online), most entries of the log that are looked at
-- Returns {now ms, {log envelope…} newest first, {retained envelope…}, highest id of the next portion (0: this was the last)}

local log, retained, following, lowest = {}, {}, 0, ARGV[1]
if ARGV[3] ~= 'retained' then
  local entries = redis.call('XREVRANGE', KEYS[1], ARGV[2], ARGV[1], 'COUNT', ARGV[4])
  for i = 1, #entries do
    local envelope = entries[i][2][2]
    local _, _, _, expires = string.match(envelope, HEADER)
    if ARGV[3] == 'all' or expires == nil or expires == '0' then
      log[#log + 1] = envelope
    end
  end
  if #entries > 0 and #entries == tonumber(ARGV[4]) then
    -- Of the retained ones only those of this portion: what is deleted before the next is read is not in it.
    lowest = string.match(entries[#entries][1], '^%d+')
    following = tonumber(lowest) - 1
  end
end
if ARGV[3] ~= 'online' then
  retained = redis.call('ZRANGE', KEYS[2], lowest, ARGV[2], 'BYSCORE')
end
return { math.floor(now_us() / 1000), log, retained, following }
