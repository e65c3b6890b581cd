-- What is still known of an app's broadcasts, for the history calls.
--
-- KEYS log, retained
-- ARGV lowest id, highest id
-- Returns {now ms, {log envelope…} newest first, {retained envelope…}}

local log = {}
local entries = redis.call('XREVRANGE', KEYS[1], ARGV[2], ARGV[1])
for i = 1, #entries do
  log[i] = entries[i][2][2]
end
return { math.floor(now_us() / 1000), log, redis.call('ZRANGE', KEYS[2], ARGV[1], ARGV[2], 'BYSCORE') }
