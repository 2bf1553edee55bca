#include "write_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

namespace faiss_saap {

namespace {

class StdioSink : public FileSink {
   public:
    StdioSink(const std::string& path, FILE* file) : path_(path), file_(file) {}
    void write(const void* data, size_t bytes) override {
        FAISS_THROW_IF_NOT_FMT(
                bytes == 0 || fwrite(data, 1, bytes, file_) == bytes,
                "%s: cannot be written: %s",
                path_.c_str(),
                std::strerror(errno));
    }

   private:
    const std::string& path_;
    FILE* file_;
};

} // namespace

void write_file(
        const std::string& path,
        const std::function<void(FileSink&)>& body) {
    std::string temporary = path + ".XXXXXX";
    const int fd = mkstemp(temporary.data());
    FAISS_THROW_IF_NOT_FMT(
            fd >= 0,
            "%s: cannot be created: %s",
            path.c_str(),
            std::strerror(errno));
    FILE* file = fdopen(fd, "wb");
    try {
        StdioSink sink(path, file);
        body(sink);
        // mkstemp gives 0600; a file should be as readable as any other.
        const mode_t mask = umask(0);
        umask(mask);
        const bool flushed = fflush(file) == 0 && fsync(fd) == 0 &&
                fchmod(fd, 0666 & ~mask) == 0;
        FAISS_THROW_IF_NOT_FMT(
                flushed,
                "%s: cannot be written: %s",
                path.c_str(),
                std::strerror(errno));
    } catch (...) {
        fclose(file);
        unlink(temporary.c_str());
        throw;
    }
    fclose(file);
    if (rename(temporary.c_str(), path.c_str()) != 0) {
        const int error = errno;
        unlink(temporary.c_str());
        FAISS_THROW_FMT(
                "%s: cannot be created: %s",
                path.c_str(),
                std::strerror(error));
    }
}

} // namespace faiss_saap
