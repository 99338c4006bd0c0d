-- Something is wanted of an agent's runs.
--
--   KEYS[2]  counters  hash    what each agent was told last, and ('') the highest of all
--   ARGV     2 agent
if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 1 then
  redis.call('HSET', KEYS[2], ARGV[2], redis.call('HINCRBY', KEYS[2], '', 1))
end
