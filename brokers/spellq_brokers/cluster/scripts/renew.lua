-- Hold an agent's lease.
--
--   KEYS[2]  agents    hash    each agent as it presents itself
--   KEYS[3]  leases    zset    agents by the end of their lease (ms)
--   KEYS[4]  counters  hash    what each agent was told last, and ('') the highest of all
--   ARGV     2 agent  3 as it presents itself  4 for how long (ms)
-- Returns its counter, grown if it held no lease.
local ends = redis.call('ZSCORE', KEYS[3], ARGV[2])
if not ends or tonumber(ends) <= now_ms() then
  redis.call('HSET', KEYS[4], ARGV[2], redis.call('HINCRBY', KEYS[4], '', 1))
end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
redis.call('ZADD', KEYS[3], now_ms() + ARGV[4], ARGV[2])
return tonumber(redis.call('HGET', KEYS[4], ARGV[2]))
