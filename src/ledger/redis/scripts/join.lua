-- Takes or renews a node's lease and reads the app's state in the same instant: what is accepted afterwards is published to
-- the node, so nothing falls in between. A backfill is the same call with a position; where more follows it than fits one answer,
-- that is all that is read, and the lease and the rest are left to the call that reads the log's end.
--
-- KEYS meta, log, retained, nodes
-- ARGV node, lease ms, after (0: the newest entries only), most entries of the log
-- Returns {now ms, head, {log envelope…} oldest first, {retained envelope…} oldest first, entries that the log ever had (-1: not known),
--          0} | {0, 0, {log envelope…}, {}, -1, id of the last of these: more may follow}

local now_ms = math.floor(now_us() / 1000)
local head = parse_meta(redis.call('GET', KEYS[1]), KEYS[2])
local log = {}
if ARGV[3] == '0' then
  local entries = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', ARGV[4])
  for i = #entries, 1, -1 do
    log[#log + 1] = entries[i][2][2]
  end
else
  local entries = redis.call('XRANGE', KEYS[2], '(' .. ARGV[3] .. '-0', '+', 'COUNT', ARGV[4])
  for i = 1, #entries do
    log[i] = entries[i][2][2]
  end
  if #entries > 0 and #entries == tonumber(ARGV[4]) then
    return { 0, 0, log, {}, -1, tonumber(string.match(entries[#entries][1], '^%d+')) }
  end
end
local retained = {}
local members = redis.call('ZRANGE', KEYS[3], 0, -1)
for i = 1, #members do
  local _, _, _, expires = string.match(members[i], HEADER)
  if (tonumber(expires) or 0) > now_ms then
    retained[#retained + 1] = members[i]
  end
end
-- By this the node counts what was let go. pcall: without the permission to ask, it estimates.
local logged = -1
local about = redis.pcall('XINFO', 'STREAM', KEYS[2])
if about.err and string.find(about.err, 'no such key', 1, true) then
  logged = 0
end
for i = 1, #about, 2 do
  if about[i] == 'entries-added' then
    logged = about[i + 1]
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', text(now_ms))
redis.call('ZADD', KEYS[4], text(now_ms + tonumber(ARGV[2])), ARGV[1])
redis.call('PEXPIRE', KEYS[4], 2 * tonumber(ARGV[2]) + SLACK)
return { now_ms, head, log, retained, logged, 0 }
