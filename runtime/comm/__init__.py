"""Process groups: every collective of the runtime is issued and counted here."""
