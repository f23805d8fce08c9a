/* How a program tells the plugin what to count: the first two arguments of getppid, which takes none. */
enum { MARK = 0x41475156, MARK_BEGIN = 1, MARK_END = 2 };
