"""The roof: walks DVC's DAG under Prefect, and starts the local servers. The only place that imports prefect."""
