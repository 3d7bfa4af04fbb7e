"""Models by name: a repository of the hub fetched whole, or judged from its headers alone."""
