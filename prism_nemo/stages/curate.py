"""Teacher demonstrations for the prompts that the policy fails at."""
