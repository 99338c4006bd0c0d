-- In front of every script: nothing is read or written under another epoch.
--
--   KEYS[1]  epoch     string  the installation's epoch, once in every shard
--   ARGV[1]            the epoch the caller knows
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return redis.error_reply('EPOCH')
end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
