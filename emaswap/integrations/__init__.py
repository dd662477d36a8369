"""Callbacks for other training frameworks. Each module imports its framework, and no other module does."""
