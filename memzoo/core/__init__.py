"""The contract and the table: nothing here knows a particular memory."""
