"""`serve`: an HTTP server around sessions, each in a process of its own."""
