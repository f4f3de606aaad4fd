"""The comparison of retrievers: query experts under different routers, on several collections, over seeds."""
