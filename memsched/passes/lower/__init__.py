"""From a decision where arrays rest to a list of actions."""
