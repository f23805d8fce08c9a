/* How a program tells the plugin what to count: the first two arguments of getppid, which takes none. What runs
   between MARK_PAUSE and MARK_RESUME is left out. */
enum { MARK = 0x41475156, MARK_BEGIN = 1, MARK_PAUSE = 2, MARK_RESUME = 3, MARK_END = 4 };
