"""Plug-ins of other engines: what they load to have moeplace balance their experts."""
