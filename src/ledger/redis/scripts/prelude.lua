#!lua
-- Shared by every script (joined in front of each). The first line gives no flags on purpose: without allow-oom a script is
-- refused as a whole when memory is full, and never writes half.
--
-- An app's meta is one string, "<head> <generation> <previous generation> <next expiry>": the newest id, the two lives of
-- the data that were last seen ("-": none), and a time (ms) before which no retained broadcast expires.

local SLACK = 0 -- ms added to every key expiry; only tests on a virtual clock set it
local JUMP = 60000000 -- µs that ids jump ahead when the generation changes
local NEVER = 9007199254740991
local MAX_RETAINED = 100
local HEADER = '^{"v":%d+,"id":(%d+),"prev":(%d+),"time":(%d+),"expires":(%d+),'

-- Redis' own clock in µs: never a worker's.
local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

-- Integers beyond 2^31 as text, without an exponent.
local function text(number)
  return string.format('%.0f', number)
end

local function parse_meta(meta, log)
  if meta then
    local head, generation, previous, next_expiry = string.match(meta, '^(%d+) (%S+) (%S+) (%d+)$')
    if not head then
      return error({ err = 'CORRUPT the meta key is not one of broadcastd' })
    end
    return tonumber(head), generation, previous, tonumber(next_expiry)
  end
  -- The meta key is gone (evicted, or deleted by hand) but the log may be there: ids go on above it. Expiry unknown: look.
  local last = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  return last and tonumber(string.match(last[1], '^%d+')) or 0, '-', '-', 0
end

local function format_meta(head, generation, previous, next_expiry)
  return text(head) .. ' ' .. generation .. ' ' .. previous .. ' ' .. text(next_expiry)
end

-- The next id, and the generations to remember with it. The previous generation is remembered too, so that two workers
-- that learn of a failover at different moments do not each make ids jump, over and over.
local function allocate(head, generation, previous, current, now)
  if current ~= generation and current ~= previous then
    -- From now, not from the head: two losses in a row must not lead to the same id twice.
    return math.max(head + 1, now + JUMP), current, generation
  end
  return math.max(head + 1, now), generation, previous
end

-- Nodes with a live lease.
local function live_nodes(nodes, now_ms)
  return redis.call('ZRANGE', nodes, '(' .. text(now_ms), '+inf', 'BYSCORE')
end

-- To the nodes' presence channels; returns how many of them were subscribed. pcall: the broadcast is already stored, so a
-- failure here must not undo the verdict; the nodes find it in the log.
local function publish(command, channel, nodes, envelope)
  local reached = 0
  for i = 1, #nodes do
    local subscribers = redis.pcall(command, channel .. nodes[i], envelope)
    if type(subscribers) == 'number' and subscribers > 0 then
      reached = reached + 1
    end
  end
  return reached
end

local function append(log, id, envelope, length, ms)
  redis.call('XADD', log, 'MAXLEN', '~', length, text(id) .. '-0', 'e', envelope)
  redis.call('PEXPIRE', log, ms + SLACK)
end

-- Removes what has expired from the retained set; returns the time of the next expiry.
local function prune(retained, now_ms)
  local next_expiry = NEVER
  local expired = {}
  local members = redis.call('ZRANGE', retained, 0, -1)
  for i = 1, #members do
    local _, _, _, expires = string.match(members[i], HEADER)
    expires = tonumber(expires) or 0
    if expires <= now_ms then
      expired[#expired + 1] = members[i]
    elseif expires < next_expiry then
      next_expiry = expires
    end
  end
  if #expired > 0 then
    redis.call('ZREM', retained, unpack(expired))
  end
  return next_expiry
end

-- Adds to the retained set, trims it to the newest 100 and has the key expire with its last member.
local function retain(retained, id, envelope, ttl_ms)
  redis.call('ZADD', retained, text(id), envelope)
  local surplus = redis.call('ZCARD', retained) - MAX_RETAINED
  if surplus > 0 then
    redis.call('ZREMRANGEBYRANK', retained, 0, surplus - 1)
  end
  if redis.call('PTTL', retained) < ttl_ms + SLACK then
    redis.call('PEXPIRE', retained, ttl_ms + SLACK)
  end
end
