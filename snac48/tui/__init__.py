"""The window of monitor.py: what jobs leave on disk, read and drawn. Only app.py needs textual."""
