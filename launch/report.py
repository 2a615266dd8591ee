"""placeholder while the ranks are tried"""


class Report:
    @classmethod
    def of(cls, *a):
        return cls()


def write_report(path, report):
    pass
