-- An agent leaves in good order.
--
--   KEYS[2]  agents    hash    each agent as it presents itself
--   KEYS[3]  leases    zset    agents by the end of their lease (ms)
--   KEYS[4]  counters  hash    what each agent was told last
--   ARGV     2 agent
redis.call('ZREM', KEYS[3], ARGV[2])
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[4], ARGV[2])
