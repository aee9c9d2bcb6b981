"""What several machines share, on one Redis server: accounts, answers, calls in flight, circuits."""
