"""Serving: engine runs students, gateway speaks HTTP."""
