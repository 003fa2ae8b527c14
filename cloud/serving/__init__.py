"""The server: connections, sessions, and the thread that runs each."""
