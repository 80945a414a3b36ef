"""Plans of training runs: schedules, shards, cost and forecasts. Pure arithmetic without torch."""
