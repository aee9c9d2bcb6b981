"""What is known of models: how they count tokens, what they cost, how much they take and give."""
