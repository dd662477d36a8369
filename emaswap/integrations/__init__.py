"""Callbacks for the training frameworks of others. Each module imports its framework, and nothing else imports it."""
