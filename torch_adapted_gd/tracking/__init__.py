"""The user's own step, followed: where parameters are used, which calls a loss went through."""
