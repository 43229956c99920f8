"""`AgentPool`: a job's agents stay resident and are asked about single texts."""
