"""The connection to Kaggle's storage, whose addresses are signed: it needs no credentials, and gets none."""

import requests


class AnonymousSession(requests.Session):
    """A session without credentials, also where the storage redirects; requests would look for some in ~/.netrc."""

    def __init__(self) -> None:
        super().__init__()
        self.auth = lambda request: request

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """Leave a redirected request as it is."""
