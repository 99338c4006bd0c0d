-- The agents whose lease is held; the others are forgotten.
--
--   KEYS[2]  agents    hash    each agent as it presents itself
--   KEYS[3]  leases    zset    agents by the end of their lease (ms)
--   KEYS[4]  counters  hash    what each agent was told last
for _, agent in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now_ms())) do
  redis.call('ZREM', KEYS[3], agent)
  redis.call('HDEL', KEYS[2], agent)
  redis.call('HDEL', KEYS[4], agent)
end
return redis.call('HVALS', KEYS[2])
