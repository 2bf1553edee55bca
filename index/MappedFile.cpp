#include "MappedFile.h"

#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

namespace faiss_saap {

MappedFile::MappedFile(const std::string& path) {
    check_path(path);
    // Without O_NONBLOCK, opening a pipe would wait for its writer.
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    FAISS_THROW_IF_NOT_FMT(
            fd >= 0, "%s: %s", path.c_str(), std::strerror(errno));
    struct stat st;
    const bool regular = fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
    void* map = nullptr;
    if (regular && st.st_size > 0) {
        map = mmap(nullptr, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    }
    close(fd);
    FAISS_THROW_IF_NOT_FMT(regular, "%s: not a regular file", path.c_str());
    FAISS_THROW_IF_NOT_FMT(
            map != MAP_FAILED, "%s: cannot be mapped", path.c_str());
    data_ = static_cast<const uint8_t*>(map);
    size_ = st.st_size;
}

MappedFile::~MappedFile() {
    if (data_) {
        munmap(const_cast<uint8_t*>(data_), size_);
    }
}

} // namespace faiss_saap
