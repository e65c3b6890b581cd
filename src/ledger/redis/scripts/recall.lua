-- Deletes a broadcast and tells the nodes. The recall is an entry of the log itself, with an id in the chain, so that a node
-- that misses it notices the gap like any other.
--
-- KEYS meta, log, retained, nodes
-- ARGV generation, id, publish command, channel prefix, log length, log ms
-- Returns {0} no such broadcast | {1, recall's id, targeted, reached}

local now = now_us()
local now_ms = math.floor(now / 1000)
local meta = redis.call('GET', KEYS[1])
local logged = redis.call('XRANGE', KEYS[2], ARGV[2] .. '-0', ARGV[2] .. '-0')[1]
local retained = redis.call('ZRANGE', KEYS[3], ARGV[2], ARGV[2], 'BYSCORE')[1]
local nodes = live_nodes(KEYS[4], now_ms)

local found = logged and not string.find(logged[2][2], HEADER .. '"recall":')
if retained then
  local _, _, _, expires = string.match(retained, HEADER)
  found = found or (tonumber(expires) or 0) > now_ms
end
if not found then
  return { 0 }
end

local head, generation, previous, next_expiry = parse_meta(meta, KEYS[2])
local id
id, generation, previous = allocate(head, generation, previous, ARGV[1], now)
local envelope = '{"v":1,"id":' .. text(id) .. ',"prev":' .. text(head) .. ',"time":' .. text(now_ms)
  .. ',"expires":0,"recall":' .. ARGV[2] .. '}'
append(KEYS[2], id, envelope, ARGV[5], tonumber(ARGV[6]))
redis.call('XDEL', KEYS[2], ARGV[2] .. '-0')
redis.call('ZREMRANGEBYSCORE', KEYS[3], ARGV[2], ARGV[2])
redis.call('SET', KEYS[1], format_meta(id, generation, previous, next_expiry))
return { 1, id, #nodes, publish(ARGV[3], ARGV[4], nodes, envelope) }
